"""What an unknown folder of logs is likely to mean, and the configuration that reads it so."""
