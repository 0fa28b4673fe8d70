"""What figures and tables are drawn with beyond `analysis.style`. Nothing here runs a model."""
