"""What SFT teaches and what it leaves alone."""
