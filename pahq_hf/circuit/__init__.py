"""The graph, circuits as files, pages and pictures, and their way to the Hub."""
