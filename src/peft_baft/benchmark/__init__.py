"""The judge: any editor, any benchmark, one protocol, one result line a run."""
