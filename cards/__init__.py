"""Templates of dataset cards; installed as `hf_reflect.card_templates`."""
