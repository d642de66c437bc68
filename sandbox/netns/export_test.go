package netns

// SetSubordinateFiles stands other files in for /etc/subuid and /etc/subgid.
func SetSubordinateFiles(uids, gids string) { subUIDFile, subGIDFile = uids, gids }

// Subordinate, Forbidden and ReadUIDMap are tested alone.
func Subordinate(file string, uid int) (start, count int, ok bool) {
	r, ok := subordinate(file, uid)
	return r.start, r.count, ok
}

var (
	Forbidden  = forbidden
	ReadUIDMap = readUIDMap
)
