"""What blocks and users attach to models: delta files and the specs of shared components."""
