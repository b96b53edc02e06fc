"""What belongs to the project's default experiment and not to the package: data preparation, labelling, measuring."""
