"""What is measured: this engine and its peers, opened on the same weights and inputs."""
