package policy

import "time"

// budgets are what is left to spend.
type budgets struct {
	b        Budget
	interval time.Duration

	at      time.Time // of the newest advance
	migrate float64   // bytes that may be copied now

	// hours are the bytes written to flash in the present hour and the 24 before it: a
	// little more than the 24 hours for which the budget of wear is.
	hours   [25]int64
	hour    int64 // the present one, since 1970
	written uint64
	known   bool // written is
}

// burst is how much of Budget.Migrate may be spent at once.
func (s *budgets) burst(setBytes int64) float64 {
	return max(float64(s.b.Migrate)*2*s.interval.Seconds(), float64(2*setBytes))
}

// advance adds what has come in since. written is what clients have ever written to flash.
func (s *budgets) advance(now time.Time, written uint64, setBytes int64) {
	burst := s.burst(setBytes)
	if s.at.IsZero() {
		s.migrate = burst
	}
	s.migrate = min(s.migrate+max(0, now.Sub(s.at).Seconds())*float64(s.b.Migrate), burst)
	s.at = now
	s.forward(now.Unix() / 3600)
	if s.known && written > s.written {
		s.wear(int64(written - s.written))
	}
	s.written, s.known = written, true
}

// forward makes an hour the present one, unless that is later.
func (s *budgets) forward(h int64) {
	if h <= s.hour {
		return
	}
	for k := max(s.hour+1, h-int64(len(s.hours))+1); k <= h; k++ {
		s.hours[k%int64(len(s.hours))] = 0
	}
	s.hour = h
}

// wear notes bytes that are written to flash.
func (s *budgets) wear(n int64) { s.hours[s.hour%int64(len(s.hours))] += n }

// worn is what was written to flash in the last 24 hours.
func (s *budgets) worn() int64 {
	n := int64(0)
	for _, h := range s.hours {
		n += h
	}
	return n
}

// may reports whether n bytes may be copied, of which so many are written to flash; why names
// the budget that does not allow it.
func (s *budgets) may(n, toFlash int64) (ok bool, why string) {
	switch {
	case s.b.Migrate > 0 && s.migrate < float64(n):
		return false, "budget.migrate"
	case s.b.Wear > 0 && toFlash > 0 && s.worn()+toFlash > int64(s.b.Wear):
		return false, "budget.wear"
	}
	return true, ""
}

// spend takes n bytes, of which so many are written to flash.
func (s *budgets) spend(n, toFlash int64) {
	if s.b.Migrate > 0 {
		s.migrate -= float64(n)
	}
	s.wear(toFlash)
}
