"""What is asked after editing: the facts themselves, their neighbours, and other contexts."""
