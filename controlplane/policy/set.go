package policy

import (
	"iter"
	"slices"
)

// set is a set that nearly always has few members, of which there are hundreds of thousands in a large cluster: a map would take a quarter of a
// kilobyte for the first. The zero value is empty.
type set[T comparable] struct {
	few  []T
	many map[T]struct{} // instead of few, once there were more than mostFew
}

const mostFew = 8

func (s *set[T]) add(v T) {
	switch {
	case s.many != nil:
		s.many[v] = struct{}{}
	case slices.Contains(s.few, v):
	case len(s.few) < mostFew:
		s.few = append(s.few, v)
	default:
		s.many = make(map[T]struct{}, 2*mostFew)
		for _, w := range s.few {
			s.many[w] = struct{}{}
		}
		s.many[v] = struct{}{}
		s.few = nil
	}
}

func (s *set[T]) remove(v T) {
	if s.many != nil {
		delete(s.many, v)
		return
	}
	if i := slices.Index(s.few, v); i >= 0 {
		s.few = slices.Delete(s.few, i, i+1)
	}
}

func (s *set[T]) has(v T) bool {
	if s.many != nil {
		_, ok := s.many[v]
		return ok
	}
	return slices.Contains(s.few, v)
}

func (s *set[T]) len() int { return len(s.few) + len(s.many) }

// all ranges over the members, in no order. The set must not be changed meanwhile.
func (s *set[T]) all() iter.Seq[T] {
	return func(yield func(T) bool) {
		for _, v := range s.few {
			if !yield(v) {
				return
			}
		}
		for v := range s.many {
			if !yield(v) {
				return
			}
		}
	}
}

// add puts a member into one of many sets, and remove takes it out. There is none that is empty.
func add[K, V comparable](m map[K]set[V], k K, v V) {
	s := m[k]
	s.add(v)
	m[k] = s
}

func remove[K, V comparable](m map[K]set[V], k K, v V) {
	s := m[k]
	if s.remove(v); s.len() == 0 {
		delete(m, k)
		return
	}
	m[k] = s
}
