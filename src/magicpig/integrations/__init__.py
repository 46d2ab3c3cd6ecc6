"""Front ends for other libraries, one package each."""
