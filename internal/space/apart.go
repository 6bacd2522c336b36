package space

// A device that is apart takes no part in the pool's free space: only AllocApart
// allocates from it. It is memory in which single blocks lie that many share, and nothing
// is promised of it. When it leaves, what it has is owed like that of others.

// SetApart makes a device one that is apart, before it is attached.
func (d *Device) SetApart() { d.apart = true }

// closed reports whether Alloc may not take anything of the device.
func (d *Device) closed() bool { return d.leaving || d.apart }

// AllocApart allocates up to n blocks with count 1 on devices that are apart, as many as
// are free there, and appends them to runs.
func (s *Space) AllocApart(n int, runs []Run) []Run {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, d := range s.devs {
		for n > 0 && d.apart && !d.leaving {
			var got int
			if got, runs = d.take(i, n, runs); got == 0 {
				got, runs = d.takeCheap(i, len(cheapSteps)-1, n, runs)
			}
			if got == 0 {
				break
			}
			n -= got
		}
	}
	return runs
}

// Apart returns how many blocks devices that are apart have, those that are leaving left
// out, and how many of these are free.
func (s *Space) Apart() (total, free int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.devs {
		if d.apart && !d.leaving {
			total += d.size()
			free += d.free
		}
	}
	return total, free
}

// IsApart reports whether a device is apart.
func (s *Space) IsApart(dev int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return dev < len(s.devs) && s.devs[dev].apart
}
