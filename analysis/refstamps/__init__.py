"""RefStamps: scenes composed of photographs, and what can be said about them. A data set like any other."""
