"""How the numbers are found: from conversations about images to batches for the Trainer."""
