"""Images against captions, as in OpenCLIP."""
