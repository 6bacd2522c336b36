package space

import "github.com/pollux-storage/pollux/internal/block"

// leaveRoom is what must be free beyond all promises for a device to leave, in
// blocks or by the share of what the others have free: some moves and the pages of
// metadata that they change are on the way at a time.
const (
	leaveRoom  = 1024
	leaveShare = 16
)

// Leaving says what stands against a device's leaving.
type Leaving struct {
	Used int64 // blocks in use on the device
	Room int64 // what the others can take beyond all that is promised, less than 0 for nothing
}

// Leave makes a device one that is leaving: nothing is allocated from it any more,
// and what it has in use is owed. It is refused, and changes nothing, when the
// others have no room for that.
func (s *Space) Leave(dev int) (l Leaving, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.devs[dev]
	if d.leaving {
		return Leaving{Used: d.inUse()}, true
	}
	s.setLeavingLocked(d, true)
	l.Used = d.inUse()
	l.Room = s.free - s.reserved - s.slop - (s.owedLocked() - l.Used)
	l.Room -= min(leaveRoom, s.free/leaveShare)
	if l.Used > l.Room {
		s.setLeavingLocked(d, false)
		return l, false
	}
	return l, true
}

// SetLeaving makes a device one that is leaving, or that stays after all, without
// asking whether there is room.
func (s *Space) SetLeaving(dev int, leaving bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.devs[dev]; d.leaving != leaving {
		s.setLeavingLocked(d, leaving)
	}
}

func (s *Space) setLeavingLocked(d *Device, leaving bool) {
	s.free -= d.allocatable()
	d.leaving = leaving
	s.free += d.allocatable()
	d.avoid, d.want = nil, block.TrackBlocks
	s.setSlopLocked()
}

// Gone makes a device that is leaving and has nothing in use one without blocks,
// whose index stays.
func (s *Space) Gone(dev int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.devs[dev]
	if !d.leaving || d.inUse() != 0 {
		panic("space: a device with blocks in use is gone")
	}
	s.devs[dev] = &Device{leaving: true}
	return d.Close()
}

// AddGone appends a device without blocks: one that was removed from the pool.
func (s *Space) AddGone() { s.Attach(&Device{leaving: true}) }

// Replace puts a device into the place of one that is gone.
func (s *Space) Replace(dev int, d *Device) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.devs[dev]; !old.leaving || old.blocks != 0 {
		panic("space: a device takes the place of one that is there")
	}
	s.devs[dev] = d
	s.free += d.allocatable()
	s.setSlopLocked()
}

// InUse returns how many blocks of a device are in use.
func (s *Space) InUse(dev int) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.devs[dev].inUse()
}

// owedLocked returns how many blocks are in use on devices that are leaving.
func (s *Space) owedLocked() (n int64) {
	for _, d := range s.devs {
		if d.leaving {
			n += d.inUse()
		}
	}
	return n
}

// ReserveOwed is Reserve for what moves blocks away from devices that are leaving:
// the room that is kept for these is what it takes, and half of the slop at most where
// metadata has grown into it. While a block's old place is not free yet it is owed
// still, so that more than that is kept from others.
func (s *Space) ReserveOwed(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reserved+n+s.slop/2 > s.free {
		return false
	}
	s.reserved += n
	return true
}
