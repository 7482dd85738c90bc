"""What every room uses: files, settings, progress bars, optional packages, local ranks."""
