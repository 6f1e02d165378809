"""Files of learned attention: saving, loading, and the formats of published weights."""
