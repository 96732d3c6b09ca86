"""Judge whether an artefact computes what the merged model does, against a float64 reference."""
