"""What makes an edit faster and changes nothing else: without this folder edits take longer and come out the same."""
