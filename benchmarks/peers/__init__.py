"""What we compare with. Nothing outside this folder imports the peers' frameworks."""
