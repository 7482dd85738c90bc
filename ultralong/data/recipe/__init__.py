"""From one recipe file to packed rows."""
