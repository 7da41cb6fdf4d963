"""Jobs on clusters: their scripts are written, submitted and followed, and what they leave is collected as records."""
