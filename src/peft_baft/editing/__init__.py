"""Knowledge editing with adapters."""
