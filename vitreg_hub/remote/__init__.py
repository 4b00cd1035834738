"""The wire: requests to the Hub, downloads into the cache, commits."""
