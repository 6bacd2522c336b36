package blocktest

import (
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
)

// TestConformance: every device of the package, and stacks of them, is a
// device as the suite wants it.
func TestConformance(t *testing.T) {
	crash := func(opts CrashOptions) hpdi.Device {
		opts.Size, opts.Seed = 1<<40, 1
		return NewCrashWith(opts)
	}
	devices := map[string]func() hpdi.Device{
		"crash":    func() hpdi.Device { return crash(CrashOptions{}) },
		"sectors":  func() hpdi.Device { return crash(CrashOptions{BlockSize: SectorSize}) },
		"direct":   func() hpdi.Device { return crash(CrashOptions{Direct: true, NoDiscard: true, NoZeroes: true}) },
		"fault":    func() hpdi.Device { return NewFault(crash(CrashOptions{}), 1) },
		"shadowed": func() hpdi.Device { return shadowed(crash(CrashOptions{})) },
		"held":     func() hpdi.Device { return held(crash(CrashOptions{Direct: true})) },
		"traced":   func() hpdi.Device { return new(Recorder).Wrap("x", shadowed(crash(CrashOptions{}))) },
		"timed": func() hpdi.Device {
			return NewSSD(IntelS3700).Wrap(NewDisk(BarracudaES2).Wrap(NewCrash(1<<30, 1)))
		},
		"aftercut": func() hpdi.Device { return NewCrash(1<<30, 1).Cut(1) },
	}
	for name, open := range devices {
		t.Run(name, func(t *testing.T) {
			hpditest.Run(t, func(*testing.T) hpdi.Device { return open() })
		})
	}
}

// shadowed passes every request on as a copy, and changes nothing.
func shadowed(dev hpdi.Device) hpdi.Device {
	f := NewFault(dev, 1)
	f.Add(Rule{Late: true})
	return f
}

// held sends every third request through a goroutine of its own.
func held(dev hpdi.Device) hpdi.Device {
	f := NewFault(dev, 1)
	f.Add(Rule{Probability: 0.3, Hold: func(*hpdi.Request) {}})
	return f
}
