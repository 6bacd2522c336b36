package cli

import "regexp"

// names are what a volume, a pool or a guest may be called: they stand in
// URIs, file names and tables as they are.
var names = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

const nameHelp = `Names have 1 to 63 letters, digits, dots, underscores and hyphens, and begin
with a letter or digit.`

// checkName complains about a name that cannot be one. what is "volume" or so.
func checkName(what, name string) error {
	if names.MatchString(name) {
		return nil
	}
	return usagef("%q cannot be the name of a %s: use 1 to 63 letters, digits, '.', '_' or '-', "+
		"beginning with a letter or digit", name, what)
}
