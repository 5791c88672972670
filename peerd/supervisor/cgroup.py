class OomKills:
    def new(self) -> int:
        return 0
