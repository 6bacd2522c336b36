package blockmap

// HasHoles reports whether ranges were trimmed that no fold has begun to free.
func (m *Map) HasHoles() bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, h := range m.active.holes {
		if len(h) > 0 {
			return true
		}
	}
	return false
}
