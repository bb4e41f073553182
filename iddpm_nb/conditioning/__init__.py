"""Networks that are told more: classes, and small images to enlarge."""
