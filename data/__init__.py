"""Scripts that fetch, make and check token shards; the shards lie here, too."""
