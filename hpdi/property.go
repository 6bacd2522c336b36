package hpdi

import (
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/internal/units"
)

// PropertyType says how the value of a property is written.
type PropertyType string

const (
	// TypeBool is on or off; true, false, yes, no, 1 and 0 are read too.
	TypeBool PropertyType = "bool"
	// TypeInt is a decimal number.
	TypeInt PropertyType = "int"
	// TypeSize is a number of bytes, such as 64GiB, 512K or 4096.
	TypeSize PropertyType = "size"
	// TypeDuration is a time, such as 1m30s or 20ms.
	TypeDuration PropertyType = "duration"
	// TypeEnum is one of Property.Values.
	TypeEnum PropertyType = "enum"
	// TypeString is any text.
	TypeString PropertyType = "string"
)

// Property is something that a driver's URI takes, or that an open device tells.
type Property struct {
	Name    string
	Type    PropertyType
	Default string // the value where none is given, as it would be written; empty: none
	// Min and Max bound numbers, sizes in bytes and durations in nanoseconds, both
	// included, for what is given as for the default. Two zeroes: there is no bound.
	Min, Max int64
	Values   []string // of an enum
	Meaning  string   // a sentence without its full stop, with units
}

// bounded reports whether Min and Max say anything.
func (p Property) bounded() bool { return p.Min != 0 || p.Max != 0 }

// Range returns in words what values the property takes: "on or off", "a size from
// 4KiB to 1TiB", "one of auto, on, off".
func (p Property) Range() string {
	var what string
	switch p.Type {
	case TypeBool:
		return "on or off"
	case TypeEnum:
		return "one of " + strings.Join(p.Values, ", ")
	case TypeInt:
		what = "a number"
	case TypeSize:
		what = "a size"
	case TypeDuration:
		what = "a duration"
	default:
		return "a text"
	}
	if !p.bounded() {
		return what
	}
	return fmt.Sprintf("%s from %s to %s", what, p.format(p.Min), p.format(p.Max))
}

// format writes a value as it would be given.
func (p Property) format(n int64) string {
	switch p.Type {
	case TypeBool:
		if n != 0 {
			return "on"
		}
		return "off"
	case TypeSize:
		return units.Format(n)
	case TypeDuration:
		return time.Duration(n).String()
	}
	return strconv.FormatInt(n, 10)
}

// parse reads a value: n of numbers, sizes in bytes, durations in nanoseconds and 0 or
// 1 for off and on.
func (p Property) parse(s string) (n int64, err error) {
	switch p.Type {
	case TypeBool:
		switch strings.ToLower(s) {
		case "on", "true", "yes", "1":
			return 1, nil
		case "off", "false", "no", "0":
			return 0, nil
		}
		return 0, fmt.Errorf("%q is neither on nor off", s)
	case TypeInt:
		n, err = strconv.ParseInt(s, 10, 64)
	case TypeSize:
		n, err = units.Parse(s)
	case TypeDuration:
		var d time.Duration
		d, err = time.ParseDuration(s)
		n = int64(d)
	case TypeEnum:
		if !slices.Contains(p.Values, s) {
			return 0, fmt.Errorf("%q is not %s", s, p.Range())
		}
		return 0, nil
	default:
		return 0, nil
	}
	if err != nil || p.bounded() && (n < p.Min || n > p.Max) {
		return 0, fmt.Errorf("%q is not %s", s, p.Range())
	}
	return n, nil
}

// Settings are the values of a driver's properties, each checked against its type and
// range.
type Settings struct {
	props []Property
	texts map[string]string
	given map[string]bool
}

// ParseSettings reads the values of properties from the query of a URI, and takes the
// defaults of those that are not there. The error wraps ErrProperty, and names the
// property and what it takes.
func ParseSettings(props []Property, given url.Values) (Settings, error) {
	s := Settings{props: props, texts: map[string]string{}, given: map[string]bool{}}
	for _, p := range props {
		s.texts[p.Name] = p.Default
	}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		i := slices.IndexFunc(props, func(p Property) bool { return p.Name == name })
		if i < 0 {
			names := make([]string, 0, len(props))
			for _, p := range props {
				names = append(names, p.Name)
			}
			if len(names) == 0 {
				return Settings{}, fmt.Errorf("%w %q: none are known here", ErrProperty, name)
			}
			return Settings{}, fmt.Errorf("%w %q is not known here: there are %s", ErrProperty, name, strings.Join(names, ", "))
		}
		if len(given[name]) != 1 {
			return Settings{}, fmt.Errorf("%w %q is given %d times", ErrProperty, name, len(given[name]))
		}
		if _, err := props[i].parse(given[name][0]); err != nil {
			return Settings{}, fmt.Errorf("%w %q (%s: %s): %w", ErrProperty, name, props[i].Type, props[i].Meaning, err)
		}
		s.texts[name], s.given[name] = given[name][0], true
	}
	return s, nil
}

// number returns the value of a property of one of the types; another name or type is a
// mistake of the program.
func (s Settings) number(name string, kind PropertyType) int64 {
	for _, p := range s.props {
		if p.Name == name && p.Type == kind {
			if s.texts[name] == "" && !s.given[name] {
				return 0 // no default
			}
			n, err := p.parse(s.texts[name])
			if err != nil {
				panic(fmt.Sprintf("hpdi: the default of property %q: %v", name, err))
			}
			return n
		}
	}
	panic(fmt.Sprintf("hpdi: there is no property %q of type %s", name, kind))
}

// Bool returns the value of a property of TypeBool, false if it has neither a value nor
// a default.
func (s Settings) Bool(name string) bool { return s.number(name, TypeBool) != 0 }

// Int returns the value of a property of TypeInt, 0 if it has none.
func (s Settings) Int(name string) int { return int(s.number(name, TypeInt)) }

// Size returns the value of a property of TypeSize in bytes, 0 if it has none.
func (s Settings) Size(name string) int64 { return s.number(name, TypeSize) }

// Duration returns the value of a property of TypeDuration, 0 if it has none.
func (s Settings) Duration(name string) time.Duration {
	return time.Duration(s.number(name, TypeDuration))
}

// Text returns the value of any property as it was written, its default if it was not,
// and "" if there is none.
func (s Settings) Text(name string) string {
	text, ok := s.texts[name]
	if !ok {
		panic(fmt.Sprintf("hpdi: there is no property %q", name))
	}
	return text
}

// Given reports whether the URI has the property.
func (s Settings) Given(name string) bool { return s.given[name] }

// List returns all properties with their values, in the driver's order.
func (s Settings) List() []Setting {
	list := make([]Setting, 0, len(s.props))
	for _, p := range s.props {
		list = append(list, Setting{p, s.texts[p.Name]})
	}
	return list
}

// Setting is a property and its value.
type Setting struct {
	Property
	Value string // as it would be written; empty: none
}

// List returns what is known of an open device as properties.
func (i Info) List() []Setting {
	flag := func(name string, on bool, meaning string) Setting {
		p := Property{Name: name, Type: TypeBool, Meaning: meaning}
		var n int64
		if on {
			n = 1
		}
		return Setting{p, p.format(n)}
	}
	size := func(name string, n int64, meaning string) Setting {
		p := Property{Name: name, Type: TypeSize, Meaning: meaning}
		return Setting{p, p.format(n)}
	}
	text := func(name, v, meaning string) Setting {
		return Setting{Property{Name: name, Type: TypeString, Meaning: meaning}, v}
	}
	return []Setting{
		text("name", i.Name, "How the user named the device"),
		text("driver", i.Driver, "What serves it"),
		size("size", i.Size, "Bytes that the device has"),
		size("block-size", int64(i.BlockSize), "Alignment and granularity of requests in bytes"),
		flag("direct", i.Direct, "Requests bypass the page cache, and their memory is aligned to block-size"),
		flag("shared-memory", i.SharedMemory, "Memory of requests must come from the library's Alloc"),
		flag("discard", i.Discard, "Ranges may be discarded"),
		flag("write-zeroes", i.Zeroes, "Zeroes may be written without sending them"),
		flag("durable", i.Durable, "Writes may be durable when they complete, without a flush"),
		flag("read-only", i.ReadOnly, "Nothing may be changed"),
		flag("rotates", i.Rotates, "Going from one place to another costs a seek, or nobody knows that it does not"),
		flag("block-status", i.Status, "The device tells which ranges are holes"),
		flag("event", i.Event, "Queues have a descriptor for poll and epoll"),
		flag("thread", i.Thread, "A queue belongs to the thread of the system that uses it first"),
		{Property{Name: "cancel", Type: TypeEnum, Values: []string{"none", "queued", "all"}, Meaning: "Which requests end when they are cancelled or their deadline passes"}, i.Cancel.String()},
		text("note", i.Note, "Why a faster way was not taken"),
	}
}
