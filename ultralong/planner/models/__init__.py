"""Models that are planned by their names alone: shapes known beforehand, and the run that is planned for them."""
