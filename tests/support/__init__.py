"""What several tests share: tiny models, dense references, launching, families of architectures."""
