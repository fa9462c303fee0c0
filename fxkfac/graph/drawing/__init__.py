"""Program -> picture or page: what is drawn of its network, where, and how it looks."""
