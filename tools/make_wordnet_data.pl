#!/usr/bin/perl
# Makes question/answer records (JSON lines) from the WordNet database of Debian's package wordnet-base.
#
#   tools/make_wordnet_data.pl [--out output/wordnet] [--train 24000] [--validation 800] [--from /usr/share/wordnet]
#
# Writes train.jsonl, validation.jsonl and WordNet's LICENSE into the folder. Same arguments, same files, byte for byte. A word is
# asked about in its most frequent sense only, so a question has one answer. No synset is on both sides. Needs no more than
# Debian's perl-base.
use strict;
use warnings;
use Getopt::Long;
use File::Path qw(make_path);

my %option = (out => 'output/wordnet', train => 24000, validation => 800, from => '/usr/share/wordnet');
GetOptions(\%option, 'out=s', 'train=i', 'validation=i', 'from=s') && !@ARGV
  or die "usage: $0 [--out FOLDER] [--train N] [--validation N] [--from FOLDER]\n";

my %name_of = (n => 'noun', v => 'verb', a => 'adjective', s => 'adjective', r => 'adverb');
my %file_of = (n => 'noun', v => 'verb', a => 'adj', r => 'adv');
my @definition_questions = (
  'What does "%s" mean as %s %s?',
  'Define the %3$s "%1$s".',
  'What is the meaning of the %3$s "%1$s"?',
  'Explain "%s" (%3$s) in a few words.',
);

# FNV-1a with a final mix: the order of everything comes from it.
sub hash_of {
  my $hash = 2166136261;
  $hash = (($hash ^ ord) * 16777619) & 0xffffffff for split //, shift;
  $hash = (($hash ^ ($hash >> 16)) * 0x45d9f3b) & 0xffffffff;
  return $hash ^ ($hash >> 15);
}

sub open_file {
  my ($mode, $path) = @_;
  open(my $file, $mode, $path) or die "$path: cannot open: $!" . ($mode eq '<' ? ' (is wordnet-base installed?)' : '') . "\n";
  return $file;
}

# lemma → offset of its most frequent sense
sub first_senses {
  my ($pos) = @_;
  my %first;
  my $file = open_file('<', "$option{from}/index.$file_of{$pos}");
  while (<$file>) {
    next if /^ /;  # licence
    my ($lemma, undef, undef, $pointers, @rest) = split ' ';
    $first{$lemma} = $rest[$pointers + 2];
  }
  return \%first;
}

# One line of data.* → the synset's words, its first hypernym, definition and examples.
sub parse_synset {
  my ($line, $pos) = @_;
  my ($fields, $gloss) = split / \| /, $line, 2;
  my @field = split ' ', $fields;
  my %synset = (offset => $field[0], pos => $pos, type => $name_of{$pos});
  my $count = hex $field[3];
  for my $i (0 .. $count - 1) {
    my $word = $field[4 + 2 * $i];
    $word =~ s/\((?:a|p|ip)\)$//;  # where an adjective may stand
    $word =~ tr/_/ /;
    push @{$synset{words}}, $word;
  }
  my $first_pointer = 5 + 2 * $count;
  for my $i (0 .. $field[4 + 2 * $count] - 1) {
    my ($symbol, $target) = @field[$first_pointer + 4 * $i, $first_pointer + 4 * $i + 1];
    $synset{hypernym} //= $target if $symbol eq '@';
  }
  $gloss =~ s/\s+$//;
  $synset{examples} = [$gloss =~ /"([^"]+)"/g];
  ($synset{definition} = $gloss) =~ s/;? *".*//s;
  return \%synset;
}

sub article { return $_[0] =~ /^[aeiou]/i ? 'an' : 'a' }

# Everyday words: lower case, letters and hyphens, at most two of them.
sub is_plain { return $_[0] =~ /^[a-z]+(?:-[a-z]+)*(?: [a-z]+)?$/ && length $_[0] > 1 }

# [question, answer] of a synset, seen from `word`.
sub questions {
  my ($synset, $word, $word_of) = @_;
  my $type = $synset->{type};
  my $hash = hash_of("$synset->{pos}$synset->{offset}");
  my @records;
  push @records, [sprintf($definition_questions[$hash % @definition_questions], $word, article($type), $type), $synset->{definition}];
  my @others = grep { $_ ne $word && is_plain($_) } @{$synset->{words}};
  if (@others) {
    push @records, ["Which words mean the same as the $type \"$word\"?", join(', ', @others)] if $hash & 64;
    push @records, ["Which $type means \"$synset->{definition}\"?", $word] unless $hash & 64;
  }
  my ($example) = grep { /\b\Q$word\E\b/i && length $_ <= 120 } @{$synset->{examples}};
  push @records, ["Use the $type \"$word\" in a sentence.", ucfirst $example] if defined $example;
  my $broader = defined $synset->{hypernym} ? $word_of->{$synset->{hypernym}} : undef;
  if (defined $broader && $broader ne $word) {
    push @records, $synset->{pos} eq 'n'
      ? ["What kind of thing is \"$word\"?", ucfirst(article($word)) . " $word is a kind of $broader."]
      : ["Which $type is more general than \"$word\"?", "To $word is one way to $broader."];
  }
  return @records;
}

# Quotes and backslashes are all that the ASCII text of WordNet needs to have escaped.
sub json_string {
  my ($text) = @_;
  $text =~ s/(["\\])/\\$1/g;
  return "\"$text\"";
}

sub write_records {
  my ($path, $records, $count) = @_;
  die "$path: only " . @$records . " records, $count were asked for\n" if @$records < $count;
  my $file = open_file('>', $path);
  printf $file "{\"question\": %s, \"answer\": %s}\n", map { json_string($_) } @$_ for @{$records}[0 .. $count - 1];
  close $file or die "$path: $!\n";
}

# WordNet's files begin with its licence, in numbered lines.
sub write_licence {
  my ($path) = @_;
  my $from = open_file('<', "$option{from}/data.noun");
  my $to = open_file('>', $path);
  while (<$from>) {
    last unless s/^  \d+ ?//;
    s/\s+$//;
    print $to "$_\n";
  }
  close $to or die "$path: $!\n";
}

my @keyed;  # [hash, side, records of a synset]
for my $pos (qw(n v a r)) {
  my $first = first_senses($pos);
  my (@synsets, %word_of);
  my $file = open_file('<', "$option{from}/data.$file_of{$pos}");
  while (<$file>) {
    next if /^ /;  # licence
    my $synset = parse_synset($_, $pos);
    $word_of{$synset->{offset}} = $synset->{words}[0];
    push @synsets, $synset;
  }
  for my $synset (@synsets) {
    my ($word) = grep { is_plain($_) && ($first->{tr/ /_/r} // '') eq $synset->{offset} } @{$synset->{words}};
    next if !defined $word || $synset->{definition} eq '' || length $synset->{definition} > 160;
    my $key = "$pos $synset->{offset}";
    push @keyed, [hash_of($key), hash_of("side $key") % 20 == 0 ? 'validation' : 'train', [questions($synset, $word, \%word_of)]];
  }
}

my %side = (train => [], validation => []);
push @{$side{$_->[1]}}, @{$_->[2]} for sort { $a->[0] <=> $b->[0] } @keyed;
make_path($option{out});
write_records("$option{out}/$_.jsonl", $side{$_}, $option{$_}) for sort keys %side;
write_licence("$option{out}/LICENSE");
print "$option{out}: $option{train} records to train on, $option{validation} to validate on (of ",
  scalar @{$side{train}}, " and ", scalar @{$side{validation}}, ")\n";
