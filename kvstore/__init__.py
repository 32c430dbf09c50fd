"""What is kept and where: keys, chunks, pages, tiers and stores."""
