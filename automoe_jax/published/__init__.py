"""What HAT and AutoMoE published, read and written: YAML files and fairseq checkpoints."""
