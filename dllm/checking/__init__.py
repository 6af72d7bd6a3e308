"""Whether what a configuration takes from the hub is there and fits its entries: seen before anything is fetched."""
