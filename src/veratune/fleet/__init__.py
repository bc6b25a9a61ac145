"""Where training and serving meet: fleets that publish into stores, and training on feedback."""
