"""Model -> program: capture, match, tap, locate, verify. Knows no curvature."""
