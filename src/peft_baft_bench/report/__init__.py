"""Results and edits as tables, figures and pages."""
