"""Many adapters over one base model, answering together."""
