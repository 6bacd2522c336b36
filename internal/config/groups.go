package config

import (
	"fmt"
	"slices"
)

// Exists tells whether the settings name a pool, be it one that is yet to be made.
func (p *Pool) Exists() bool { return !p.Manual || len(p.Devices) > 0 }

// Groups returns the devices by what the pool sees of them: each by itself, or the
// copies of a mirror together.
func (p *Pool) Groups() [][]string {
	out := p.MemberGroups()
	if c := p.Candidate(); len(c) > 0 {
		out = append(out, c)
	}
	return out
}

// Members returns the devices without those that are being added.
func (p *Pool) Members() []string { return p.Devices[:len(p.Devices)-p.Adding] }

// MemberGroups is Groups without those that are being added.
func (p *Pool) MemberGroups() [][]string {
	var out [][]string
	for i, rest := 0, p.Members(); len(rest) > 0; i++ {
		n := max(p.Copies, 1)
		if len(p.Widths) > 0 {
			n = p.Widths[min(i, len(p.Widths)-1)]
		}
		n = min(n, len(rest))
		out, rest = append(out, rest[:n:n]), rest[n:]
	}
	return out
}

// Candidate returns the devices that are being added.
func (p *Pool) Candidate() []string { return p.Devices[len(p.Devices)-p.Adding:] }

// Mirrored tells whether all devices of the pool are mirrors.
func (p *Pool) Mirrored() bool {
	groups := p.Groups()
	return len(groups) > 0 && !slices.ContainsFunc(groups, func(g []string) bool { return len(g) < 2 })
}

// WidthsOf returns what Widths are to be for groups of devices: none where all have
// so many copies.
func WidthsOf(groups [][]string, copies int) []int {
	var widths []int
	same := true
	for _, g := range groups {
		widths = append(widths, len(g))
		same = same && len(g) == copies
	}
	if same {
		return nil
	}
	return widths
}

func (p *Pool) validateGroups() error {
	if p.Adding < 0 || p.Adding > min(len(p.Devices), MaxCopies) {
		return fmt.Errorf("%d of %d devices are being added", p.Adding, len(p.Devices))
	}
	n := len(p.Devices) - p.Adding
	if len(p.Widths) == 0 {
		if n%p.Copies != 0 {
			return fmt.Errorf("%d devices cannot be divided into mirrors of %d", n, p.Copies)
		}
		return nil
	}
	sum := 0
	for _, w := range p.Widths {
		if w < 1 || w > MaxCopies {
			return fmt.Errorf("a device with %d copies", w)
		}
		sum += w
	}
	if sum != n {
		return fmt.Errorf("%d devices are not mirrors of %d", n, p.Widths)
	}
	return nil
}
