// Package release says what this build of the program is: its version, and the
// versions of the formats that it reads and writes, on devices, in regions and
// in what agent, guests and commands say to each other.
//
// [Formats] is the one table of them. Each package keeps the number of its own
// format beside the code that needs it; a test finds all such numbers and fails
// when the table does not say the same. docs/format/README.md shows the table,
// which another test holds.
//
// Two builds work as a pair, one guest of each, when each reads what the other
// writes: during an upgrade the pool of an old guest is taken over by a new one
// and given back. [Compare] tells whether they do.
package release
