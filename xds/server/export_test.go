package server

// Waiting reports whether a Wait is under way for a client.
func (l *Ledger) Waiting(name Client) bool {
	c := l.s.lookup(name)
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed != nil
}
