"""Any model file → Network, any data → views, module → graph. Import from the files: nothing is loaded before it is used."""
