"""Memory: measured (`meter`), shown (`report`)."""
