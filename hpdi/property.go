package hpdi

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
	// included. Two zeroes: there is no bound.
	Min, Max int64
	Values   []string // of an enum
	Meaning  string   // a sentence without its full stop, with units
}
