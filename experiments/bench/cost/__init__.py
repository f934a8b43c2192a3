"""What a model costs before it runs anywhere: counted on the meta device, predicted for a table of devices."""
