"""Memory: foretold (`predict`), chosen within (`plan`), measured (`meter`), shown (`report`)."""
