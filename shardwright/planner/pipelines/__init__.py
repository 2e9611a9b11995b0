"""What a pipeline of stages costs: seconds, bytes, messages, and the collectives of its data-parallel copies."""
