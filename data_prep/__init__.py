"""Raw scans to a corpus: readers, canonical volumes, quality gates, shards. No torch in here."""
